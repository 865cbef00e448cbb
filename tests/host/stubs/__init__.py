"""Our stand-ins for tools of the host's tests; `fetch.STUB_FILES` says which file stands in for which."""
