# A server: /slow?ms=3000 takes that long. With "drain", SIGTERM lets it finish its requests.
require "socket"

class Stop < StandardError; end

def serve(client)
  request = client.gets.to_s
  until [nil, "\r\n"].include?(client.gets) do end
  sleep(request[/ms=(\d+)/, 1].to_i / 1000.0)
  client.write("HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\ndone\n")
ensure
  client.close
end

server = TCPServer.new("0.0.0.0", ARGV[0].to_i)
trap("TERM") { raise Stop } if ARGV[1] == "drain"
requests = []
begin
  loop { requests << Thread.new(server.accept) { |client| serve(client) } }
rescue Stop
  server.close
  requests.each(&:join)
end
