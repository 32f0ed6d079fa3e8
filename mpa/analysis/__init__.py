"""Tables, checks, diagnosis, report, ratings, the guard’s verdict: made from runs, never from a model."""
