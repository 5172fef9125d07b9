"""A year of temperatures made with numpy, grouped with pandas, drawn with matplotlib into a PNG."""

import matplotlib

matplotlib.use("Agg")  # there is no display in a sandbox
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

random = np.random.default_rng(seed=7)
hours = pd.date_range("2025-01-01", "2025-12-31 23:00", freq="h")
season = -np.cos(2 * np.pi * hours.day_of_year / 365.25)
time_of_day = -np.cos(2 * np.pi * (hours.hour - 3) / 24)
weather = np.convolve(random.normal(0, 1, len(hours) + 71), np.ones(72) / np.sqrt(72), mode="valid")
temperature = pd.Series(9.5 + 10 * season + 4 * time_of_day + 3 * weather, index=hours, name="celsius")

monthly = temperature.groupby(temperature.index.month).agg(["min", "mean", "max"]).round(1)
monthly.index.name = "month"
monthly.to_csv("monthly.csv")
print(monthly)

daily = temperature.resample("D").agg(["min", "mean", "max"])
figure, axes = plt.subplots(figsize=(10, 5), layout="constrained")
axes.fill_between(daily.index, daily["min"], daily["max"], alpha=0.3, label="day's range")
axes.plot(daily.index, daily["mean"].rolling(7, center=True).mean(), label="mean of 7 days")
axes.set_ylabel("°C")
axes.set_title("A year of made-up weather")
axes.legend()
figure.savefig("weather.png", dpi=100)
print(f"numpy {np.__version__}, pandas {pd.__version__}, matplotlib {matplotlib.__version__}")
