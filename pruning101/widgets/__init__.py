"""The interactive figures of the lessons, one module a lesson."""
