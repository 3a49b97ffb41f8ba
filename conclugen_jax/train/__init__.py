"""What every kind of training shares: devices, batches, the optimizer's update, memory. Uses ``run`` and the rooms below."""
