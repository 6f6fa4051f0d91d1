"""Recurrent networks: `GRU`, `LSTM` and any cell, differentiated over all time steps at once."""
