# With the plugins that it needs, and one thread, it starts with half the CPU time.
export RABBITMQ_PLUGINS_DIR=/tmp/plugins RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS="+S 1:1"
mkdir /tmp/plugins
for plugin in aten credentials_obfuscation cuttlefish gen_batch_server getopt jsx osiris ra rabbit rabbit_common \
    rabbitmq_prelaunch ranch recon seshat stdout_formatter syslog sysmon_handler systemd; do
    ln -s /usr/lib/rabbitmq/lib/rabbitmq_server-*/plugins/$plugin-* /tmp/plugins
done
export HOME=/tmp RABBITMQ_MNESIA_BASE=/tmp/mnesia RABBITMQ_ENABLED_PLUGINS_FILE=/tmp/enabled_plugins
export RABBITMQ_LOGS=- RABBITMQ_NODENAME=rabbit@localhost RABBITMQ_CONFIG_FILE=/tmp/rabbitmq
# Without this, guest may log in from the same host only.
echo "[{rabbit, [{tcp_listeners, [PORT]}, {loopback_users, []}]}]." >/tmp/rabbitmq.config
exec /usr/lib/rabbitmq/bin/rabbitmq-server
