"""Fills an SQLite database in a transaction, undoes another, searches it, and leaves it as an output."""

import sqlite3

BOOKS = [
    ("Middlemarch", "George Eliot", 1871),
    ("Silas Marner", "George Eliot", 1861),
    ("Emma", "Jane Austen", 1815),
    ("Persuasion", "Jane Austen", 1817),
    ("Bleak House", "Charles Dickens", 1853),
    ("Villette", "Charlotte Brontë", 1853),
]

database = sqlite3.connect("library.db")
database.execute("PRAGMA journal_mode=WAL")
database.executescript("""
    CREATE TABLE author (id INTEGER PRIMARY KEY, name TEXT UNIQUE NOT NULL);
    CREATE TABLE book (title TEXT NOT NULL, author INTEGER NOT NULL REFERENCES author (id), year INTEGER NOT NULL);
    CREATE TABLE loan (book INTEGER NOT NULL, day INTEGER NOT NULL);
    CREATE INDEX loan_by_book ON loan (book);
""")
with database:
    for title, author, year in BOOKS:
        database.execute("INSERT OR IGNORE INTO author (name) VALUES (?)", (author,))
        database.execute("INSERT INTO book SELECT ?, id, ? FROM author WHERE name = ?", (title, year, author))
    database.executemany("INSERT INTO loan VALUES (?, ?)", ((1 + (n * n + n // 7) % 6, n % 365) for n in range(20000)))
try:
    with database:
        database.execute("DELETE FROM loan")
        database.execute("INSERT INTO book VALUES (NULL, 1, 1900)")
except sqlite3.IntegrityError as error:
    print("undone:", error)

QUERY = """
    SELECT author.name, count(DISTINCT book.rowid), count(*) AS loans
    FROM loan JOIN book ON book.rowid = loan.book JOIN author ON author.id = book.author
    GROUP BY author.id ORDER BY loans DESC, author.name
"""
for name, books, loans in database.execute(QUERY):
    print(f"{name:18} {books} books {loans:6} loans")
print("integrity:", database.execute("PRAGMA integrity_check").fetchone()[0])
database.execute("PRAGMA journal_mode=DELETE")  # one file, without its write-ahead log
database.close()
