"""Robot descriptions and inverse kinematics."""
