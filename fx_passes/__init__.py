"""Floor 3, put it in the graph: normalize, rewrite, the backend, the report, explain, the command line."""
