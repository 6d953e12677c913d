"""Create the tables: python init_db.py

With the tables of modules of your own, such as notes.py: python init_db.py notes
"""

import sys
from importlib import import_module
from pathlib import Path

from sqlalchemy import create_engine, func, inspect, select
from sqlalchemy.exc import SQLAlchemyError

from main import CONNECT_ARGS, DATABASE_URL, Base, describe_database_error

# Any number will do, as long as no other program locks the same one.
LOCK = 1635087464


def init_db() -> None:
    """Create the tables that are missing, all of them or none, and print each name.

    Raises SQLAlchemyError if the database refuses, and ValueError, before anything is
    created, if a table that is already there lacks a column of its model. A table is
    never altered.
    """
    tables = Base.metadata.sorted_tables
    already_there = set()
    # The tables are created in one transaction, which begin() commits at the end.
    with create_engine(DATABASE_URL, connect_args=CONNECT_ARGS).begin() as connection:
        # Hosts may run this command several times at once. The lock, which is held until
        # the commit, lets one go first: otherwise two would create the same table.
        connection.execute(select(func.pg_advisory_xact_lock(LOCK)))
        inspector = inspect(connection)  # reads which tables and columns there are
        for table in tables:
            if inspector.has_table(table.name, schema=table.schema):
                already_there.add(table)
                found = inspector.get_columns(table.name, schema=table.schema)
                names = [column["name"] for column in found]
                for column in table.columns:
                    if column.name not in names:
                        raise ValueError(f"table {table.fullname} lacks {column.name}")
        Base.metadata.create_all(connection)
    for table in tables:
        state = "already there" if table in already_there else "created"
        print(f"{table.fullname}: {state}")


if __name__ == "__main__":
    try:
        for module in sys.argv[1:]:
            # Tab completion gives a path, ./app/models.py, for the module app.models.
            path = Path(module.removesuffix(".py"))
            if ".." in path.parts:
                raise ValueError(f"{module} is not in this folder")
            import_module(".".join(path.parts))
        init_db()
    except SQLAlchemyError as error:
        sys.exit(f"error: no tables created: {describe_database_error(error)}")
    except (ModuleNotFoundError, ValueError) as error:
        sys.exit(f"error: no tables created: {error}")
