"""Settings of every test."""

import hypothesis

# The fixture `apiserver`: one for all directories.
pytest_plugins = ["support.apiserver"]

# A test never asserts an absolute time: machines are shared.
hypothesis.settings.register_profile("tidegate", deadline=None)
hypothesis.settings.load_profile("tidegate")
