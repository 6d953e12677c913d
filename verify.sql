-- Shows the table that init_db.py created: psql "$DATABASE_URL" -f verify.sql
-- It only reads. It fails with status 3 if the table is not there.

\set ON_ERROR_STOP on
\set QUIET on
\pset pager off

\echo 'The columns'
SELECT column_name, data_type, is_nullable, column_default
FROM information_schema.columns
WHERE table_schema = current_schema() AND table_name = 'users'
ORDER BY ordinal_position;

\echo 'The keys'
SELECT constraint_name, constraint_type, column_name
FROM information_schema.table_constraints
JOIN information_schema.key_column_usage
    USING (constraint_schema, constraint_name, table_name)
WHERE constraint_schema = current_schema() AND table_name = 'users'
ORDER BY constraint_name;

\echo 'The newest users, with the start of the hash: its kind and its cost'
SELECT id, email, left(hashed_password, 7) AS hash, is_active, created_at
FROM users
ORDER BY created_at DESC
LIMIT 5;
