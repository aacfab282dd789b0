import com.sun.net.httpserver.HttpServer;
import java.net.InetSocketAddress;
import java.util.concurrent.Executors;

/** A server: /slow?ms=3000 takes that long. With "drain", a shutdown hook lets it finish its requests. */
class Server {
    public static void main(String[] arguments) throws Exception {
        var server = HttpServer.create(new InetSocketAddress(Integer.parseInt(arguments[0])), 0);
        server.setExecutor(Executors.newCachedThreadPool());
        server.createContext("/", exchange -> exchange.close());
        server.createContext("/slow", exchange -> {
            try {
                Thread.sleep(Long.parseLong(exchange.getRequestURI().getQuery().replace("ms=", "")));
            } catch (InterruptedException e) {
                return;
            }
            exchange.sendResponseHeaders(200, 5);
            exchange.getResponseBody().write("done\n".getBytes());
            exchange.close();
        });
        server.start();
        if (arguments.length > 1) {
            Runtime.getRuntime().addShutdownHook(new Thread(() -> server.stop(5)));
        }
    }
}
