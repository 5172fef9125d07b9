"""HTTP and nothing else: parsing, bounds, routes, streams. Knows jobs, never the spawner's inside."""
