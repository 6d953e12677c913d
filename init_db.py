"""Create the tables: `python init_db.py`; notes.py's too: `python init_db.py notes`."""

import os
import sys
from importlib import import_module
from pathlib import Path

from sqlalchemy import create_engine, exc, inspect, text

# main.py reads every setting; this command needs DATABASE_URL alone.
os.environ.update(JWT_SECRET=32 * "x", ACCESS_TOKEN_MINUTES="1", BCRYPT_ROUNDS="4")
from main import CONNECT_ARGS, REMEDIES, Base, engine

PARTS = text(r"""WITH t AS (SELECT oid AS id, relname FROM pg_class
    WHERE relname = ANY(:names) AND pg_table_is_visible(oid))  -- in the database's own words
  SELECT concat_ws('.', relname, attname), trim(concat_ws(' ', format_type(atttypid, atttypmod),
    CASE WHEN attnotnull THEN 'NOT NULL' END, 'DEFAULT ' || pg_get_expr(adbin, adrelid),
    CASE attidentity WHEN 'a' THEN 'ALWAYS IDENTITY' WHEN 'd' THEN 'IDENTITY' END,
    replace(attgenerated, 's', 'STORED'))) FROM t JOIN pg_attribute ON attrelid = id AND attnum > 0
    AND NOT attisdropped LEFT JOIN pg_attrdef ON adrelid = id AND adnum = attnum
  UNION SELECT concat_ws(' UNIQUE ', relname, substring(pg_get_indexdef(indexrelid), '\(.*')),
    'there' FROM t JOIN pg_index ON indrelid = id AND indisunique AND indimmediate
  UNION SELECT concat_ws(' ', relname, pg_get_constraintdef(oid)), 'there'
    FROM t JOIN pg_constraint ON conrelid = id AND contype IN ('c', 'f', 'x')""")


def init_db() -> None:
    """Create the missing tables: all or none, in one transaction, one caller at a time."""
    tables = Base.metadata.sorted_tables
    names = {"names": [table.name for table in tables if not table.schema]}
    with create_engine(engine.url, connect_args=CONNECT_ARGS).begin() as db:
        db.execute(text("SELECT pg_advisory_xact_lock(1635087464)"))
        there = [t for t in tables if inspect(db).has_table(t.name, schema=t.schema)]
        Base.metadata.create_all(db)
        has = {part: words for part, words in db.execute(PARTS, names)}
        moment = db.begin_nested()  # the models as temporary tables, to compare with
        db.execution_options(schema_translate_map={t.schema: "pg_temp" for t in tables})
        Base.metadata.create_all(db, checkfirst=False)
        want = {part: words for part, words in db.execute(PARTS, names)}
        moment.rollback()
        has = dict.fromkeys(want, "absent") | has
        want = {p: "absent" for p in has if has[p].endswith("NOT NULL")} | want
        if bad := [f"{p} is {has[p]}, not {w}" for p, w in want.items() if has[p] != w]:
            raise ValueError(f"not as the model has it: {'; '.join(bad)}")
    for table in tables:
        print(f"{table.name}: {'already there' if table in there else 'created'}")


if __name__ == "__main__":
    try:
        for name in sys.argv[1:]:
            import_module(Path(name).stem)
        init_db()
    except (exc.DBAPIError, ImportError, ValueError) as error:
        said = str(getattr(error, "orig", error)).partition("\n")[0]
        said += "".join(f"; {REMEDIES[words]}" for words in REMEDIES if words in said)
        sys.exit(f"error: no tables created at {engine.url.host}: {said}")
    for file in Path(__file__).parent.glob("*.py"):
        if file.stem not in [*sys.modules, "init_db"] and "(Base)" in file.read_text():
            print(f"{file.name} has a model too: python init_db.py {file.stem}")
