"""Marks a folder of the fetched host tests as a package."""
