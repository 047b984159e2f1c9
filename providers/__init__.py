"""The systems outside: wire format in, plain values out. Knows neither the database nor the queue."""
