"""Standard attacks and models, for the demo, the tests and the benchmark. Nothing of an audit imports it."""
