"""The test suite; a package, so that processes started by a test can import the test's own functions by name."""
