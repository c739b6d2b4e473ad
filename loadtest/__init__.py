"""One definition of the load, its player against a live server, and the report: were the promises kept."""
