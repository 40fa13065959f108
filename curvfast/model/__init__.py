"""A torch model as named linear maps, and the batches and rows that count."""
