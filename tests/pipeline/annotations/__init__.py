"""Tests of the annotation readers."""
