-- psql "$DATABASE_URL" -f verify.sql
-- Shows the table that `python init_db.py` made. Only reads; fails (status 3) when it is missing.

\set ON_ERROR_STOP on
\set QUIET on
\pset pager off

\echo 'Columns'
SELECT attname AS column, format_type(atttypid, atttypmod) AS type,
       CASE WHEN attnotnull THEN 'NOT NULL' ELSE 'NULL' END AS nullable,
       pg_get_expr(adbin, adrelid) AS default
FROM pg_attribute LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum
WHERE attrelid = 'users'::regclass AND attnum > 0 AND NOT attisdropped
ORDER BY attnum;

\echo 'Keys'
SELECT conname AS name, pg_get_constraintdef(oid) AS definition
FROM pg_constraint
WHERE conrelid = 'users'::regclass AND contype IN ('p', 'u')
ORDER BY conname;

\echo 'Users'
SELECT count(*) AS users FROM users;

\echo 'The newest, with the first 7 characters of their hash: its kind and its cost'
SELECT id, email, left(hashed_password, 7) AS hash, is_active, created_at
FROM users
ORDER BY created_at DESC
LIMIT 5;
