"""Create the tables: `python init_db.py`. The only moment at which tables are ever created."""

import os
import secrets
import warnings
from typing import Any

from sqlalchemy import (
    Connection,
    Table,
    UniqueConstraint,
    create_engine,
    func,
    inspect,
    select,
)
from sqlalchemy.exc import CompileError, DBAPIError, SAWarning

# Importing main reads every setting. This command needs DATABASE_URL alone: it signs no token and
# hashes no password, so it answers for the other settings itself.
os.environ |= {"JWT_SECRET": secrets.token_hex(32)}
os.environ |= {"ACCESS_TOKEN_MINUTES": "30", "BCRYPT_ROUNDS": "4"}

from main import CONNECT_ARGS, DATABASE_URL, Base, database_message, refuse

warnings.simplefilter("ignore", SAWarning)  # of column types that it does not know

LOCK = 0x61757468  # any number will do, as long as every init_db.py takes the same


def describe(connection: Connection, kind: Any, nullable: bool, default: Any) -> str:
    """A column in SQL's words, such as "BOOLEAN NOT NULL with a default"."""
    try:
        words = kind.compile(connection.dialect)
    except CompileError:  # point, xml and others that SQLAlchemy does not know
        words = "of another type"
    words += " NULL" if nullable else " NOT NULL"
    return words + (" with a default" if default is not None else "")


def differences(connection: Connection, table: Table) -> list[str]:
    """What sets the table in the database apart from the model, a phrase per column.

    A column that is not in the model counts only if an INSERT would have to fill it.
    """
    inspector = inspect(connection)
    found = {
        column["name"]: describe(
            connection, column["type"], column["nullable"], column["default"]
        )
        for column in inspector.get_columns(table.name)
    }
    wanted = {
        column.name: describe(
            connection, column.type, column.nullable, column.server_default
        )
        for column in table.columns
    }
    unique = [
        set(u["column_names"]) for u in inspector.get_unique_constraints(table.name)
    ]
    return [
        *(
            f"{name} is {found.get(name, 'missing')}, should be {wanted[name]}"
            for name in wanted
            if found.get(name) != wanted[name]
        ),
        *(
            f"{name} is {found[name]}, should not be there"
            for name in found.keys() - wanted.keys()
            if found[name].endswith(" NOT NULL")
        ),
        *(
            f"{', '.join(constraint.columns.keys())} is not UNIQUE"
            for constraint in table.constraints
            if isinstance(constraint, UniqueConstraint)
            and set(constraint.columns.keys()) not in unique
        ),
    ]


def init_db() -> None:
    """Create the tables that are missing and say so, in one transaction, one caller at a time.

    Exits without a change when a table exists but differs from the model, for `create_all`
    leaves such a table as it is, and when the database cannot be reached.
    """
    engine = create_engine(
        DATABASE_URL, connect_args=CONNECT_ARGS, hide_parameters=True
    )
    try:
        with engine.begin() as connection:
            connection.execute(select(func.pg_advisory_xact_lock(LOCK)))
            there = inspect(connection).get_table_names()
            Base.metadata.create_all(connection)
            for table in Base.metadata.sorted_tables:
                if lines := differences(connection, table):
                    refuse(
                        f"table {table.name} differs from the model: {'; '.join(lines)}"
                    )
    except DBAPIError as error:
        where = DATABASE_URL.host or DATABASE_URL.query.get("host", "the local socket")
        refuse(f"cannot create tables at {where}: {database_message(error)}")
    for table in Base.metadata.sorted_tables:
        print(f"{table.name}: {'already there' if table.name in there else 'created'}")


if __name__ == "__main__":
    init_db()
