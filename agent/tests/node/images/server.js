// A server: /slow takes three seconds. With "drain", SIGTERM lets it finish its requests.
const server = require("http").createServer((request, response) => {
  response.setHeader("Connection", "close");
  setTimeout(() => response.end("done\n"), request.url.startsWith("/slow") ? 3000 : 0);
});
server.listen(Number(process.argv[2]));
if (process.argv[3] === "drain") process.on("SIGTERM", () => server.close());
