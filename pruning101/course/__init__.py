"""The tools around the lessons: the command line, building, running and assigning notebooks."""
