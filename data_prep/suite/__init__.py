"""The suite: tasks of many kinds whose rows are made on the spot from packages with free licences; see SUITE.md."""
