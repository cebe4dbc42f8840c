"""Tests of all packages; see README.md."""
