FROM python:3.13-slim

# 0.0.0.0, because a container's own 127.0.0.1 is out of everybody's reach.
ENV HOST=0.0.0.0 PORT=5000 PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
WORKDIR /app

# The packages before the source: they change less often, so their layer is kept.
COPY requirements.txt .
RUN pip install --no-cache-dir --disable-pip-version-check -r requirements.txt
COPY server.py dashboard.html ./

USER 10001:10001
EXPOSE 5000
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s \
  CMD ["python", "-c", "import os, urllib.request as u; u.urlopen(f\"http://127.0.0.1:{os.environ['PORT']}/health\")"]
CMD ["python", "server.py"]
