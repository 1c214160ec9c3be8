"""What a prompt is made of, exactly: frozen prompts, sources, paths, attribution graphs, interventions."""
