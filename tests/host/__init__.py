"""The host library's own common tests, run against this project's model classes (``make test-host``)."""
