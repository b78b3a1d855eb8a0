import java.io.IOException;
import java.io.UncheckedIOException;
import java.net.InetAddress;
import java.net.ServerSocket;
import java.net.Socket;
import java.net.StandardProtocolFamily;
import java.net.UnixDomainSocketAddress;
import java.nio.channels.ServerSocketChannel;
import java.nio.channels.SocketChannel;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.List;

/** Stands for buildkitd: listens on a free loopback port and holds the connections that the test opens to it. */
final class Server implements AutoCloseable {

    private final ServerSocket listener;
    private final List<Connection> open = new ArrayList<>();

    private Server(ServerSocket listener) {
        this.listener = listener;
    }

    /** Listens on every address, IPv4 and IPv6, as buildkitd does. */
    static Server start() {
        return at("::");
    }

    /** Listens on one address, such as 127.0.0.1 or ::1. */
    static Server at(String address) {
        try {
            return new Server(new ServerSocket(0, 300, InetAddress.getByName(address)));
        } catch (IOException e) {
            throw new UncheckedIOException(e);
        }
    }

    int port() {
        return listener.getLocalPort();
    }

    /** Opens a connection from 127.0.0.1. */
    Connection connect() {
        return connect("127.0.0.1");
    }

    /** Opens a connection to the address, which must be one that the server listens on. */
    Connection connect(String address) {
        try {
            Connection connection = new Connection(new Socket(address, port()), listener.accept());
            open.add(connection);
            return connection;
        } catch (IOException e) {
            throw new UncheckedIOException(e);
        }
    }

    @Override
    public void close() {
        open.forEach(Connection::close);
        closeQuietly(listener);
    }

    private static void closeQuietly(AutoCloseable socket) {
        try {
            socket.close();
        } catch (Exception e) {
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
            try {
                address = UnixDomainSocketAddress.of(file);
                listener = ServerSocketChannel.open(StandardProtocolFamily.UNIX).bind(address);
            } catch (IOException e) {
                throw new UncheckedIOException(e);
            }
        }

        /** Opens a connection, which the server does not accept yet. Returns the client's end. */
        SocketChannel knock() {
            try {
                SocketChannel client = SocketChannel.open(address);
                open.add(client);
                return client;
            } catch (IOException e) {
                throw new UncheckedIOException(e);
            }
        }

        /** Accepts the connection that has waited longest. Returns the server's end. */
        SocketChannel accept() {
            try {
                SocketChannel server = listener.accept();
                open.add(server);
                return server;
            } catch (IOException e) {
                throw new UncheckedIOException(e);
            }
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
