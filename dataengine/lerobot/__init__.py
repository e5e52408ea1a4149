"""LeRobot v3.0 datasets on disk; the public names are in :mod:`dataengine.episodes`."""
