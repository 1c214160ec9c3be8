"""Studies and ratings of features by rules that the code keeps: what is hidden cannot be read."""
