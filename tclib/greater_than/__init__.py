"""The greater-than task, the components that it needs, and features against neurons."""
