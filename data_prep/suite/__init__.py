"""The suite: tasks of many kinds, with rows generated from packages with free licenses; see SUITE.md."""
