"""Everything between the network and the decoders: schedules, steps, loops, conditioning, super-resolution, sizes."""
