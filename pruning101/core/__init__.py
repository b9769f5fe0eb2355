"""What every topic stands on: data, models, training, measuring, masks, structure, steps, plots."""
