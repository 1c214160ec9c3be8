"""How faithful a dictionary is: metrics, replacement in the running model, the table of losses."""
