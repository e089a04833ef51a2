"""What is looked at and changed in the user's network: its layers, their calls, who may be replaced, the swap."""
