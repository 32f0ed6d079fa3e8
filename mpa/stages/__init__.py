"""The bodies of PA, PI and evaluate: ask, judge, write. What decides a sample is in `mpa.method`."""
