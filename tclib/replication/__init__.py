"""The sequence of notebooks: presets, runs, a module a notebook, and what it says beside the paper."""
