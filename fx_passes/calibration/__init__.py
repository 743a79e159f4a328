"""calibrate: measure candidates at every site of a model, and choose among them within an error budget."""
