import java.io.*;
import java.net.*;
import java.nio.channels.*;
import java.nio.file.Path;
import java.util.*;
import java.util.concurrent.Callable;

/** Stands for buildkitd: listens on a free loopback port and holds the connections that the test opens to it. */
final class Server implements AutoCloseable {

    private final ServerSocket listener;
    private final List<Connection> open = new ArrayList<>();

    private Server(ServerSocket listener) { this.listener = listener; }

    /** Listens on every address, IPv4 and IPv6, as buildkitd does. */
    static Server start() { return at("::"); }

    /** Listens on one address, such as 127.0.0.1 or ::1. */
    static Server at(String address) {
        return new Server(unchecked(() -> new ServerSocket(0, 300, InetAddress.getByName(address))));
    }

    int port() { return listener.getLocalPort(); }

    /** Opens a connection from 127.0.0.1. */
    Connection connect() { return connect("127.0.0.1"); }

    /** Opens a connection to the address, which must be one that the server listens on. */
    Connection connect(String address) {
        Connection connection = unchecked(() -> new Connection(new Socket(address, port()), listener.accept()));
        open.add(connection);
        return connection;
    }

    @Override
    public void close() {
        open.forEach(Connection::close);
        closeQuietly(listener);
    }

    private static <T> T unchecked(Callable<T> socketCall) {
        try {
            return socketCall.call();
        } catch (Exception e) {
            throw new IllegalStateException(e);
        }
    }

    private static void closeQuietly(Closeable socket) {
        try {
            socket.close();
        } catch (IOException e) {
            // it is gone either way
        }
    }

    /** Both ends of an established connection. */
    record Connection(Socket client, Socket server) implements AutoCloseable {
        /** Closes the client's end first, as a client does whose build has ended. */
        @Override
        public void close() {
            closeQuietly(client);
            closeQuietly(server);
        }
    }

    /** Stands for buildkitd on a unix socket. */
    static final class OnSocket implements AutoCloseable {
        private final UnixDomainSocketAddress address;
        private final ServerSocketChannel listener;
        private final List<SocketChannel> open = new ArrayList<>();

        /** Listens on a file that is not there yet. */
        OnSocket(Path file) {
            address = UnixDomainSocketAddress.of(file);
            listener = unchecked(() -> ServerSocketChannel.open(StandardProtocolFamily.UNIX).bind(address));
        }

        /** Opens a connection, which the server does not accept yet. Returns the client's end. */
        SocketChannel knock() { return keep(unchecked(() -> SocketChannel.open(address))); }

        /** Accepts the connection that has waited longest. Returns the server's end. */
        SocketChannel accept() { return keep(unchecked(listener::accept)); }

        private SocketChannel keep(SocketChannel end) {
            open.add(end);
            return end;
        }

        /** Opens a connection. Closing what is returned closes both ends, the client's first. */
        AutoCloseable connect() {
            SocketChannel client = knock();
            SocketChannel server = accept();
            return () -> {
                client.close();
                server.close();
            };
        }

        @Override
        public void close() {
            open.forEach(Server::closeQuietly);
            closeQuietly(listener);
        }
    }
}
