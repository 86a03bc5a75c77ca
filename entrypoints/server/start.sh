#!/usr/bin/env bash
# A tracking server for several people or machines: runs in PostgreSQL, artifacts passed on by the
# server, so that clients need access to neither.
#
#   pip install -c constraints.txt -e '.[study,server]'
#   BACKEND=postgresql+psycopg2://mlflow@127.0.0.1/mlflow ARTIFACTS=/srv/mlflow entrypoints/server/start.sh
#
# BACKEND        the database, with the driver's name (SQLAlchemy 2.1 takes plain postgresql:// to
#                mean psycopg 3); its password comes from ~/.pgpass or PGPASSWORD, not from here
# ARTIFACTS      a folder, s3://..., gs://... or the like        [./mlflow-artifacts]
# HOST, PORT     where it listens                                [127.0.0.1, 5000]
# WORKERS        processes                                       [4]
# ALLOWED_HOSTS  names, with ports, by which it is called, such as mlflow.example.org,10.0.0.7:5000
# AUTH=basic     users and passwords, kept in basic_auth.db (MLFLOW_AUTH_CONFIG_PATH changes that).
#                The first, admin, gets MLFLOW_AUTH_ADMIN_PASSWORD; sessions are signed with
#                MLFLOW_FLASK_SERVER_SECRET_KEY (openssl rand -hex 32).
#
# It listens on this machine only. Any other HOST needs AUTH=basic and ALLOWED_HOSTS; put a proxy
# with TLS before it, as basic authentication sends passwords in the clear.
set -euo pipefail

fail() { echo "start.sh: $*" >&2; exit 2; }

[ -n "${BACKEND:-}" ] || fail "set BACKEND, such as postgresql+psycopg2://mlflow@127.0.0.1/mlflow"
HOST="${HOST:-127.0.0.1}"
options=(--host "$HOST" --port "${PORT:-5000}" --workers "${WORKERS:-4}"
         --artifacts-destination "${ARTIFACTS:-./mlflow-artifacts}" --serve-artifacts)

case "$HOST" in
  127.*|localhost|::1) ;;
  *) [ "${AUTH:-}" = basic ] || fail "HOST=$HOST lets others in: set AUTH=basic"
     [ -n "${ALLOWED_HOSTS:-}" ] || fail "HOST=$HOST: set ALLOWED_HOSTS to the names it is called by" ;;
esac
[ -z "${ALLOWED_HOSTS:-}" ] || options+=(--allowed-hosts "$ALLOWED_HOSTS")
case "${AUTH:-}" in
  "") ;;
  basic)
    [ -n "${MLFLOW_FLASK_SERVER_SECRET_KEY:-}" ] || fail "AUTH=basic: set MLFLOW_FLASK_SERVER_SECRET_KEY"
    options+=(--app-name basic-auth) ;;
  *) fail "AUTH is 'basic' or not set; got $AUTH" ;;
esac

export MLFLOW_BACKEND_STORE_URI="$BACKEND"  # not an argument: the process list shows those
# Judges and prompt optimisation, which eight more processes would wait for.
export MLFLOW_SERVER_ENABLE_JOB_EXECUTION="${MLFLOW_SERVER_ENABLE_JOB_EXECUTION:-false}"
exec mlflow server "${options[@]}"
