"""Models with columns of every kind, which init_db.py must create and find again."""

import enum
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from inspect import isclass
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql
from sqlalchemy.orm import Mapped, mapped_column, relationship

from main import Base, User

# PostgreSQL has no such type, or has it only with an extension, or it is no type by itself.
NOT_OFFERED = {
    *("BINARY", "BLOB", "CLOB", "DATETIME", "DOUBLE", "NVARCHAR", "VARBINARY"),
    *("CITEXT", "HSTORE"),
    *("NullType", "TupleType", "TypeDecorator", "TypeEngine", "UserDefinedType"),
    *("AbstractMultiRange", "AbstractRange", "AbstractSingleRange", "NamedType"),
    *("ExternalType", "SchemaType", "Variant", "_Binary"),
}
NEED_ARGUMENTS = {"ARRAY", "DOMAIN", "ENUM", "Enum"}
PLAIN = [
    kind()
    for module in (sa.types, postgresql)
    for name, kind in vars(module).items()
    if isclass(kind) and issubclass(kind, sa.types.TypeEngine)
    if name not in NOT_OFFERED | NEED_ARGUMENTS
]
WITH_ARGUMENTS = [
    sa.ARRAY(sa.Integer),
    sa.CHAR(3),
    sa.DateTime(timezone=True),
    sa.Double(53),
    sa.Enum("a", "b", name="letter"),
    sa.Float(24),
    sa.Interval(second_precision=3),
    sa.LargeBinary(9),
    sa.Numeric(10, 2),
    sa.String(9, collation="C"),
    sa.Time(timezone=True),
    sa.Uuid(as_uuid=False),
    postgresql.ARRAY(postgresql.TEXT, dimensions=2),
    postgresql.BIT(4),
    postgresql.BIT(5, varying=True),
    postgresql.DOMAIN("percent", sa.Integer, check="VALUE <= 100"),
    postgresql.ENUM("c", "d", name="other_letter"),
    postgresql.INTERVAL(fields="DAY TO SECOND", precision=2),
    postgresql.TIME(precision=2),
    postgresql.TIMESTAMP(timezone=True, precision=2),
]
types = sa.Table(
    "types",
    Base.metadata,
    *(sa.Column(f"c{n}", kind) for n, kind in enumerate(PLAIN + WITH_ARGUMENTS)),
)


class Mood(enum.Enum):
    happy = 1
    sad = 2


class Note(Base):
    __tablename__ = "Notes of mine"

    id: Mapped[int] = mapped_column(primary_key=True)
    number: Mapped[int] = mapped_column(sa.BigInteger, sa.Identity(), unique=True)
    double: Mapped[int] = mapped_column(sa.Computed("number * 2", persisted=True))
    mood: Mapped[Mood] = mapped_column(server_default="happy")
    moods: Mapped[list[Mood]] = mapped_column(postgresql.ARRAY(sa.Enum(Mood)))
    kind: Mapped[str] = mapped_column(
        sa.Enum("a", "b", name="kind", native_enum=False, create_constraint=True)
    )
    owner_id: Mapped[UUID] = mapped_column(sa.ForeignKey(User.id, ondelete="CASCADE"))
    owner: Mapped[User] = relationship()
    parent_id: Mapped[int | None] = mapped_column(sa.ForeignKey("Notes of mine.id"))
    price: Mapped[Decimal] = mapped_column(server_default="0")
    day: Mapped[date] = mapped_column(index=True)
    hour: Mapped[time | None]
    lasts: Mapped[timedelta]
    changed: Mapped[datetime] = mapped_column(server_default=sa.func.now())
    ratio: Mapped[float] = mapped_column(server_default="1.5")
    picture: Mapped[bytes | None] = mapped_column(deferred=True)
    words: Mapped[dict[str, int]] = mapped_column(
        postgresql.JSONB, server_default=sa.text("'{}'")
    )
    order: Mapped[int] = mapped_column(default=3)

    __table_args__ = (
        sa.CheckConstraint("number > 0"),
        sa.UniqueConstraint("day", "order", name="one_a_day"),
        sa.Index("early", "day", unique=True, postgresql_where=sa.text("number < 9")),
        sa.Index("lower", sa.func.lower(kind.column), unique=True),
        postgresql.ExcludeConstraint(("number", "="), using="btree"),
    )


class Place(Base):
    __tablename__ = "places"

    row: Mapped[int] = mapped_column(primary_key=True)
    seat: Mapped[int] = mapped_column(primary_key=True)
    turn: Mapped[int] = mapped_column(sa.Identity(always=True, start=5))
    ticket: Mapped[int] = mapped_column(
        sa.Sequence("tickets"), server_default=sa.Sequence("tickets").next_value()
    )
    mood: Mapped[Mood]


class Visit(Base):
    __tablename__ = "visits"

    id: Mapped[int] = mapped_column(sa.SmallInteger, primary_key=True)
    row: Mapped[int]
    seat: Mapped[int]

    __table_args__ = (
        sa.ForeignKeyConstraint(["row", "seat"], ["places.row", "places.seat"]),
    )


class Elsewhere(Base):
    __tablename__ = "stays"
    __table_args__ = {"schema": "elsewhere"}  # noqa: RUF012

    id: Mapped[int] = mapped_column(sa.BigInteger, primary_key=True)
    owner_id: Mapped[UUID] = mapped_column(sa.ForeignKey(User.id))
