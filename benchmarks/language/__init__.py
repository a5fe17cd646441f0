"""What benchmarks/language_race.py is made of."""
