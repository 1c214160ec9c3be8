"""Text to rows of tokens, and the bundled world whose every token has a known label."""
