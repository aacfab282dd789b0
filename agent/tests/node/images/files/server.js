// A server: /slow?ms=3000 takes that long. With "drain", SIGTERM lets it finish its requests.
const server = require("http").createServer((request, response) => {
  response.setHeader("Connection", "close");
  const url = new URL(request.url, "http://server");
  setTimeout(() => response.end("done\n"), Number(url.searchParams.get("ms")));
});
server.listen(Number(process.argv[2]));
if (process.argv[3] === "drain") process.on("SIGTERM", () => server.close());
