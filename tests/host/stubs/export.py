"""Stands in for the host's export tests, which its source distribution leaves out."""


class ExportTesterMixin:
    """Empty: ``torch.export`` is tested by this project's own tests."""
