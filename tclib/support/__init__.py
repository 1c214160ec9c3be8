"""What every room stands on: errors, files, steps and their manifests, statistics, progress bars."""
