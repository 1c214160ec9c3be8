"""What one feature reads and writes: weights, examples on text, connections, dashboards."""
