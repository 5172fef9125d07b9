"""Reads a year of sales from a CSV file, draws a chart of each region's months, and writes a summary."""

import csv
import sys
from collections import Counter, defaultdict

MONTHS = "Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec".split()
COLOURS = {"north": "#4477aa", "east": "#228833", "south": "#cc6677", "west": "#aa8822"}
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 860, 420, 70, 90, 50, 40


def read(path):
    """Revenue by region and month, by product, and the number of rows that were used and left out."""
    by_month = defaultdict(lambda: [0.0] * 12)
    by_product = Counter()
    used = left_out = 0
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            try:
                revenue = int(row["units"]) * float(row["unit_price"])
            except ValueError:
                print(f"row {used + left_out + 2} has no price: left out", file=sys.stderr)
                left_out += 1
                continue
            by_month[row["region"]][int(row["date"][5:7]) - 1] += revenue
            by_product[row["product"]] += revenue
            used += 1
            if used % 1000 == 0:
                print(f"{used} rows read", flush=True)
    return dict(by_month), by_product, used, left_out


def chart(by_month):
    """A line for each region, as SVG."""
    top = max(max(months) for months in by_month.values())
    step = 10 ** (len(str(int(top))) - 1) / 2
    top = (top // step + 1) * step

    def x(month):
        return LEFT + month * (WIDTH - LEFT - RIGHT) / 11

    def y(revenue):
        return HEIGHT - BOTTOM - revenue / top * (HEIGHT - TOP - BOTTOM)

    def text(at_x, at_y, words, **style):
        style = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in style.items())
        return f'<text x="{at_x:.1f}" y="{at_y:.1f}"{style}>{words}</text>'

    size = f'viewBox="0 0 {WIDTH} {HEIGHT}"'
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        text(LEFT, 28, "Revenue by region and month", font_size=18),
    ]
    for level in range(int(top / step) + 1):
        height = y(level * step)
        lines.append(f'<path d="M{LEFT} {height:.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>')
        lines.append(text(LEFT - 8, height + 4, f"{level * step:,.0f}", text_anchor="end"))
    for month, name in enumerate(MONTHS):
        lines.append(text(x(month), HEIGHT - 16, name, text_anchor="middle"))
    label = HEIGHT
    for region, months in sorted(by_month.items(), key=lambda item: item[1][11]):
        points = " ".join(f"{x(month):.1f},{y(revenue):.1f}" for month, revenue in enumerate(months))
        colour = COLOURS.get(region, "#555")
        lines.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2.5"/>')
        label = min(label - 15, y(months[11]) + 4)  # beside its line's end, but never over the one below
        lines.append(text(x(11) + 10, label, region, fill=colour))
    return "\n".join([*lines, "</svg>", ""])


def summary(by_month, by_product, used, left_out):
    total = sum(by_product.values())
    regions = sorted(by_month, key=lambda region: -sum(by_month[region]))
    best_region, best_month = max(((r, m) for r in by_month for m in range(12)), key=lambda at: by_month[at[0]][at[1]])
    lines = [f"{used} sales, {total:,.2f} in all ({left_out} rows without a price left out)", ""]
    lines += [f"{region:8} {sum(by_month[region]):12,.2f} {sum(by_month[region]) / total:6.1%}" for region in regions]
    lines += [""]
    lines += [f"{product:8} {revenue:12,.2f} {revenue / total:6.1%}" for product, revenue in by_product.most_common()]
    best = by_month[best_region][best_month]
    return "\n".join([*lines, "", f"best month: {MONTHS[best_month]} in the {best_region}, {best:,.2f}", ""])


by_month, by_product, used, left_out = read(sys.argv[1])
with open("chart.svg", "w") as file:
    file.write(chart(by_month))
with open("summary.txt", "w") as file:
    file.write(summary(by_month, by_product, used, left_out))
print(summary(by_month, by_product, used, left_out), end="")
