export PATH=/parts/usr/lib/postgresql/15/bin:$PATH
initdb --no-sync --auth=trust --pgdata /tmp/data >/dev/null
echo "host all all all trust" >>/tmp/data/pg_hba.conf
exec postgres -D /tmp/data -p PORT -c listen_addresses='*' -c unix_socket_directories=/tmp -c fsync=off
